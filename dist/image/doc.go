// Package image builds the container image of overlayd: from scratch, without a container daemon, the same bit by bit each
// time. It holds our own programs, the reference CNI plugins, and iptables with what it needs from Debian.
package image
