"""What every run needs: configuration, command line, data, models, records, report."""
