"""The grid that fills the tables and figures of the paper with numbers of our own: `python -m benchmarks.paper`."""
