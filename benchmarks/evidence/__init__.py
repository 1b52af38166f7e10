"""The parts of `evidence_table.py`: data, bases, methods, runs, the choice of rates, intervals, report, carrying."""
