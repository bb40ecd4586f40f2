"""What every request passes before a route: keys, bodies, failures as answers, the end of the server."""
