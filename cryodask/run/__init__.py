"""What runs when: project file -> plan -> runners."""
