package main

import (
	"context"
	"net/netip"
	"time"

	"github.com/overlayd/overlayd/diag/doctor"
	"github.com/overlayd/overlayd/diag/probe"
)

// ping is how the doctor asks other nodes.
func ping(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration) ([]doctor.Pong, error) {
	return pongs(probe.Once(ctx, to, size, count, wait))
}

// knock is how it asks those that ignore pings.
func knock(ctx context.Context, to []netip.Addr, size, count int, wait time.Duration) ([]doctor.Pong, error) {
	return pongs(probe.Knock(ctx, to, size, count, wait))
}

func pongs(outcomes []probe.Outcome, err error) ([]doctor.Pong, error) {
	out := make([]doctor.Pong, 0, len(outcomes))
	for _, o := range outcomes {
		out = append(out, doctor.Pong(o))
	}
	return out, err
}
