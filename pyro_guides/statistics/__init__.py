"""Statistics on NumPy arrays: importance weights and uniformity."""
