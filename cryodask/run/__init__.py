"""From project file to plan to runners: what runs, and when."""
