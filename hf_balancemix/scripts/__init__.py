"""What a command line needs: the parser, the arguments of the scripts, and what the scripts do."""
