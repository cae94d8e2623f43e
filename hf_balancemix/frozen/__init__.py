"""A backbone that is not trained: its features are computed once, a small head is trained on them."""
