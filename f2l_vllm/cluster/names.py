"""Names in Ray Serve: of applications, and of the deployments in them. A Serve config uses them, too."""

APP = "f2l"
FRONT = "Front"
ENGINE = "Engine"
WORKERS_APP = "workers"
