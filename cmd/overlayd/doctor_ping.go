package main

import (
	"context"
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/doctor"
	"github.com/overlayd/overlayd/probe"
)

// ping is how the doctor asks other nodes.
func ping(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration) ([]doctor.Pong, error) {
	outcomes, err := probe.Once(ctx, to, size, count, wait)
	pongs := make([]doctor.Pong, 0, len(outcomes))
	for _, o := range outcomes {
		pongs = append(pongs, doctor.Pong(o))
	}
	return pongs, err
}
