"""The stages of a run, one file each: they gather what a library function needs, call it, and keep what it made."""
