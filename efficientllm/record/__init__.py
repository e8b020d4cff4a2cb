"""What a run leaves behind: its folder, its row, its event files, and where it came from."""
