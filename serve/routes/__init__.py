"""The routes of the HTTP API by what they are about; each module adds its own to the application."""
