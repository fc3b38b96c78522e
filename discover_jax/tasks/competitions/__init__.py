"""The competitions that come with the project, a module each."""
