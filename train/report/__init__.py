"""One page and one table from the CSV files of a results folder."""
