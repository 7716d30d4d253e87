package etcd

import (
	"context"
	"time"
)

// Everything here is a pure function of its arguments; rnd is a number in [0, 1), where a node's own chance comes in.

const (
	backoffMin = 200 * time.Millisecond
	backoffMax = 15 * time.Second

	probeEvery    = time.Minute
	claimAgain    = 10 * time.Second
	firstRenewal  = 30 * time.Second
	raceDelayUnit = 10 * time.Millisecond

	// The watch waits for the claim: so long for there to be one (the caller has the table by then), and so long for what comes of it.
	claimSoon     = 500 * time.Millisecond
	claimPatience = time.Minute
	// Behind the claim it waits only where that many others wrote meanwhile, and never longer than this.
	crowd       = 100
	watchPutOff = 20 * time.Second

	paceMin = 10 * time.Millisecond
	paceMax = 100 * time.Millisecond
)

// backoff is how long to wait after the attempt-th failure in a row (from 0): between one half and the whole of a time that
// doubles up to a maximum.
func backoff(attempt int, rnd float64) time.Duration {
	d := backoffMax
	if attempt < 16 {
		d = min(d, backoffMin<<attempt)
	}
	return d/2 + scale(d/2, rnd)
}

// raceDelay is how long to wait after the attempt-th lost race in a row (from 1). The loser knows what changed and can go on at
// once; what it waits for is that not all losers do so together.
func raceDelay(attempt int, rnd float64) time.Duration {
	return scale(raceDelayUnit<<min(max(attempt-1, 0), 6), rnd)
}

// watchDelay is how long to put the watch off after a claim, given how many others wrote meanwhile: where they are many, the longer it
// took, the more there will be.
func watchDelay(others int64, took time.Duration, rnd float64) time.Duration {
	if others < crowd {
		return 0
	}
	d := min(took, watchPutOff/8)
	return 2*d + scale(6*d, rnd)
}

// around is d give or take a quarter.
func around(d time.Duration, rnd float64) time.Duration { return d*3/4 + scale(d/2, rnd) }

// pace is how long to gather changes before the next snapshot, given what the last one took: to hand them on may cost a tenth of
// the time at most, however many come.
func pace(cost time.Duration) time.Duration { return min(max(10*cost, paceMin), paceMax) }

// renewal is when to renew an etcd lease whose TTL is known and which is fresh: within the second quarter of it. Two renewals may
// fail before it's late.
func renewal(ttl time.Duration, rnd float64) time.Duration { return ttl/4 + scale(ttl/4, rnd) }

// unknownRenewal is when to renew an etcd lease that was found on a key. How long it still has is not known (to ask would be a
// request as well), so it can't wait; but neither must a thousand nodes that start together ask together.
func unknownRenewal(ttl time.Duration, rnd float64) time.Duration {
	return scale(min(ttl/4, firstRenewal), rnd)
}

func scale(d time.Duration, rnd float64) time.Duration { return time.Duration(float64(d) * rnd) }

// sleep waits for d, for wake, or for the end of ctx. A negative d is for ever.
func sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	var timeout <-chan time.Time
	if d >= 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timeout = t.C
	}
	select {
	case <-ctx.Done():
	case <-wake:
	case <-timeout:
	}
}

// poke wakes up who waits on a channel of size 1; a poke that was not yet noticed counts for both.
func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
