"""One file for each package: its pinned archive, and how its contents become files we can load."""
