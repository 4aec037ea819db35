"""The experiments of the chapters: functions that return tidy tables, one module a chapter."""
