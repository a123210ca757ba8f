"""Long-Range Arena: readers of the files that exist, and generators for what can be generated."""
