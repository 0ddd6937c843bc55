"""The dashboard of a facility as a service of JupyterHub: add this to the Hub's own configuration."""

# provided by JupyterHub when it reads the file
c = get_config()  # type: ignore[name-defined]  # noqa: F821

c.JupyterHub.services = [
    *c.JupyterHub.get("services", []),
    {
        # the Hub's proxy passes /services/cryodask/... on, so facility.yaml has  listen: {prefix: /services/cryodask}
        "name": "cryodask",
        "url": "http://127.0.0.1:8443",
        # systemd runs the server, as an account that is not the Hub's; people log in as facility.yaml says
        "display": True,
    },
]
