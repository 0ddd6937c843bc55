"""Access control: certificates, versions, and the gate in front of every server."""
