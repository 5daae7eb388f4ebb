"""Networks; one file each."""
