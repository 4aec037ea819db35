"""The figures of the chapters: functions that take tables and return matplotlib figures."""
