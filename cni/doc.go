// Package cni is the logic of the CNI plugin overlay-cni. It turns a network configuration and subnet.env, which the
// daemon writes, into the configuration of another plugin (bridge with host-local, unless told otherwise), and has that
// one do the work:
//
//	stdin ──▶ ParseConfig ──▶ Config ─┐
//	                                  ├─ Config.Generate (pure) ──▶ Delegate ──▶ kept in dataDir, then started
//	subnet.env ▶ ParseSubnetEnv ▶ SubnetEnv
//
// What was generated at ADD is kept for each container and interface, so that CHECK and DEL need neither the daemon nor
// the subnet of that time.
//
// A plugin is started for each pod: the package knows nothing of the kernel, of etcd, and of the rest of the daemon.
package cni
