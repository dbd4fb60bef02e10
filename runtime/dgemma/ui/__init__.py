"""Output that several commands share: lines on the terminal, progress bars, charts."""
