"""Reports of runs: one self-contained HTML page, tables and figures. Imports nothing heavy by itself."""
