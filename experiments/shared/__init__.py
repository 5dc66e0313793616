"""What several experiments do alike: runs on disk, command lines, recipes with options."""
