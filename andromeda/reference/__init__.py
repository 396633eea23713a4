"""The operations in plain torch. Every other backend is measured against this one, and it runs everywhere.

No function casts: each computes in the dtype of its arguments, so that tests can pass float64.
"""
