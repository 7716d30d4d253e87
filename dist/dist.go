// Package dist has the drop-ins that `overlayd doctor --fix` writes.
package dist

import "embed"

// DropIns keep other programs off overlayd's devices. Their paths are those below /etc.
//
//go:embed NetworkManager systemd/network systemd/networkd.conf.d
var DropIns embed.FS
