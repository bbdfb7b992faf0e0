"""The continual-safety benchmark on the embedded model: sequences of tuning steps, methods, metrics, cached rows."""
