package agent

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/overlayd/overlayd/netstate"
)

const (
	// bridgePatience is how long a loss must last to be one: whoever makes a bridge gives it its address a moment
	// later.
	bridgePatience = 3 * time.Second
	// bridgeEvery is how often to look while something is lost: the kernel's events about ports that come back are
	// passed over.
	bridgeEvery, bridgeAtLeast = 5 * time.Second, 30 * time.Second
)

// podBridges is what the agent knows of the pods' bridges. It makes none, and changes none: it says what another
// program took from them.
type podBridges struct {
	known []netstate.PodBridge
	lost  string    // what they have lost, as it is said
	since time.Time // when it was lost
}

// due is when to tell of a loss that may be none; the zero time: there is none.
func (b podBridges) due(now time.Time) time.Time {
	if said := b.since.Add(bridgePatience); b.lost != "" && now.Before(said) {
		return said
	}
	return time.Time{}
}

// gist is what is worth to be written down at once. Ports come and go with the pods.
func (b podBridges) gist() string {
	var out strings.Builder
	for _, k := range b.known {
		fmt.Fprint(&out, k.Name, k.Addrs)
	}
	return out.String() + b.lost
}

// followBridges looks whether the pods' bridges still have what they had. What they have not is no reason to be not
// ready: it may be that no pod needs it.
func (a *Agent) followBridges(now time.Time) {
	b := &a.bridges
	known, losses := netstate.FollowBridges(b.known, a.host, a.lease.Subnets)
	var said []string
	for _, l := range losses {
		said = append(said, l.String()+": "+l.Commands()[0])
	}
	lost := strings.Join(said, "; ")
	if lost != "" && b.lost == "" {
		b.since = now
	}
	b.known, b.lost = known, lost
	switch {
	case lost == "":
		a.health.set(condBridge, nil)
	case !now.Before(b.since.Add(bridgePatience)):
		a.health.set(condBridge, errors.New(lost))
	}
	if lost != "" {
		// Less and less often: with many peers, a look at the whole kernel is dear.
		a.audit = earlier(a.audit, now.Add(max(bridgeEvery, min(now.Sub(b.since)/4, bridgeAtLeast))))
	}
}
