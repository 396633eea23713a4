"""The command `andromeda`. Nothing here loads torch before `main` is imported."""
