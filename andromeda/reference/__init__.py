"""The operations in plain torch: what every other backend is measured against, and the one that runs everywhere.

Nothing here casts: a function computes in the dtype it is handed, so that tests can hand it float64.
"""
