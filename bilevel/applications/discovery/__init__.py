"""Scientific discovery."""
