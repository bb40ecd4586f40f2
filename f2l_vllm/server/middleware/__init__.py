"""What every request passes before a route: key check, body check, errors as answers, and the shutdown."""
