"""The parts of commands that people see: lines on the terminal, progress bars, charts."""
