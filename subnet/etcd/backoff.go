package etcd

import (
	"math/rand/v2"
	"time"
)

// The functions here are pure but for chance, which gives their argument rnd, a number in [0, 1).

const (
	backoffMin = 200 * time.Millisecond
	backoffMax = 15 * time.Second

	probeEvery    = time.Minute
	claimAgain    = 10 * time.Second
	unknownTTL    = 30 * time.Second
	raceDelayUnit = 10 * time.Millisecond

	// The watch waits for the claim: so long for there to be one (the caller has the table by then), and so long for
	// what comes of it.
	claimSoon     = 500 * time.Millisecond
	claimPatience = time.Minute
	// After the claim it waits only if that many other nodes wrote meanwhile, and never longer than this.
	crowd       = 100
	watchPutOff = 20 * time.Second

	// The bounds of gather.
	gatherMin, gatherMax = 10 * time.Millisecond, 100 * time.Millisecond
)

func chance() float64 { return rand.Float64() }

// backoff is how long to wait after the attempt-th failure in a row (from 0): between one half and the whole of a time
// that doubles up to a maximum.
func backoff(attempt int, rnd float64) time.Duration {
	d := backoffMax
	if attempt < 16 {
		d = min(d, backoffMin<<attempt)
	}
	return d/2 + scale(d/2, rnd)
}

// raceDelay is how long to wait after the attempt-th lost race in a row (from 1). The loser knows what changed and can
// go on at once; what it waits for is that not all losers do so together.
func raceDelay(attempt int, rnd float64) time.Duration {
	return scale(raceDelayUnit<<min(max(attempt-1, 0), 6), rnd)
}

// watchDelay is how long to put the watch off after a claim, given how many other nodes wrote meanwhile: if they are
// many, the longer it took, the more there will be.
func watchDelay(others int64, took time.Duration, rnd float64) time.Duration {
	if others < crowd {
		return 0
	}
	d := min(took, watchPutOff/8)
	return 2*d + scale(6*d, rnd)
}

// gather is for how long changes are gathered after a snapshot that took some time: a tenth of the time goes into them.
func gather(took time.Duration) time.Duration { return min(max(10*took, gatherMin), gatherMax) }

// around is d give or take a quarter.
func around(d time.Duration, rnd float64) time.Duration { return d*3/4 + scale(d/2, rnd) }

// renewal is when to renew an etcd lease whose TTL is known and which is fresh: within the second quarter of it. Two
// renewals may fail before it's late.
func renewal(ttl time.Duration, rnd float64) time.Duration { return ttl/4 + scale(ttl/4, rnd) }

// firstRenewal is when to renew an etcd lease that this node begins to hold. How long one still has that was found on a
// key is not known (to ask would be a request as well), so it can't wait; but neither must a thousand nodes that start
// together ask together.
func firstRenewal(expires time.Time, ttl time.Duration, now time.Time, rnd float64) time.Time {
	if expires.IsZero() {
		return now.Add(scale(min(ttl/4, unknownTTL), rnd))
	}
	return now.Add(renewal(max(expires.Sub(now), 0), rnd))
}

func scale(d time.Duration, rnd float64) time.Duration { return time.Duration(float64(d) * rnd) }
