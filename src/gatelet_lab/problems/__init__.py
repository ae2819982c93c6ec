"""The problems of `gatelet diagnose`, a file each; every one prints what it found and returns it as Markdown."""
