"""The field table, cell by cell: a fixed sample in every run of the tests, all cells with --every-cell."""
