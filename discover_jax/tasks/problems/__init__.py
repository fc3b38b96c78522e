"""The problems that come with the project, a module each, and the exact arithmetic that they share."""
