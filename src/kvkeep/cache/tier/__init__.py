"""Places for pages below memory: sealed frames in host memory and in files."""
