package masquerade

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Watch is notified of changes in nf_tables, in the network namespace of the calling thread, until ctx ends: of those
// that name our table or a chain of iptables in which we have rules. The channel holds one notification, however many
// there were; it is closed when the kernel notifies no longer. The rules of iptables-nft are in nf_tables; of changes
// in those of iptables-legacy the kernel sends no notifications.
func Watch(ctx context.Context) (<-chan struct{}, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("netlink socket for nf_tables: %w", err)
	}
	_ = conn.SetReadBuffer(watchBuffer) // where it is denied, a lost notification is a notification too
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("notifications of nf_tables: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	changes := make(chan struct{}, 1)
	go func() {
		defer stop()
		defer close(changes)
		for {
			messages, err := conn.Receive()
			switch {
			case errors.Is(err, unix.ENOBUFS): // the kernel dropped some
			case err != nil:
				_ = conn.Close()
				return
			case !slices.ContainsFunc(messages, func(m netlink.Message) bool { return concerns(m.Data) }):
				continue
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	return changes, nil
}

// watchBuffer holds the notifications of a large transaction (kube-proxy's, say) until they are read, in bytes.
const watchBuffer = 8 << 20

// concerns tells whether a message about nf_tables names our table, or a place of ours in a table of iptables. Names
// stand in it as they are, with a zero behind; where exactly is no matter, since a notification only means: compare.
func concerns(message []byte) bool {
	if names(message, ownTable) {
		return true
	}
	for _, p := range Places() {
		if names(message, string(p.Table)) && (names(message, string(p.Hook)) || names(message, p.Name)) {
			return true
		}
	}
	return false
}

// names tells whether a name stands in a message, and is not the end of a longer one.
func names(message []byte, name string) bool {
	for rest := message; ; {
		at := bytes.Index(rest, append([]byte(name), 0))
		if at < 0 {
			return false
		}
		if at == 0 || rest[at-1] < ' ' {
			return true
		}
		rest = rest[at+1:]
	}
}
