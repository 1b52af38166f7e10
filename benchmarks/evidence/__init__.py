"""The parts of `evidence_table.py`: data, bases, methods, the loop, units of work, results, intervals, report."""
