"""What commands show: lines on the terminal, progress bars, charts."""
