"""query -> answer, and release -> deployment."""
