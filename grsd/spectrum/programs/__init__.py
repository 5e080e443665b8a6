"""Linear maps recorded from a run of torch operations: record, transpose, simplify, run again."""
