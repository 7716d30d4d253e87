package page

import (
	"bytes"
	"cmp"
	"html/template"
	"slices"
	"strconv"
	"time"

	"github.com/overlayd/overlayd/diag/status"
)

// state is the state of a peer, and the CSS class of its tile.
type state string

const (
	answers           = state(status.Answers)
	lossy             = state(status.Lossy)
	smallOnly         = state(status.SmallOnly)
	silent            = state(status.Silent)
	notPinged   state = "not-pinged"
	unreachable state = "unreachable"
	rejected    state = "rejected"
	leaving     state = "leaving"
)

// legendItem is one state and the number of peers in it.
type legendItem struct {
	State   state
	Label   string
	Meaning string
	Count   int
	Rank    int // 0 is the worst
}

// states lists all states in the order of the legend.
func states() []legendItem {
	return []legendItem{
		{State: answers, Rank: 7, Label: "answers", Meaning: "The last pings of both sizes were answered."},
		{State: lossy, Rank: 3, Label: "lossy", Meaning: "Some of the last pings were lost."},
		{State: smallOnly, Rank: 1, Label: "small only", Meaning: "Small packets arrive, full-size ones are lost: " +
			"the path MTU is smaller than this node assumes. Connections open and then hang. " +
			"Compare the MTU of the network between the two nodes with that of the tunnel device."},
		{State: silent, Rank: 0, Label: "silent", Meaning: "None of the last pings was answered: the peer is down, " +
			"a firewall drops the tunnel's packets, or the return path is broken."},
		{State: unreachable, Rank: 2, Label: "unreachable", Meaning: "This node has no path to the peer and sends " +
			"nothing to it."},
		{State: rejected, Rank: 4, Label: "rejected", Meaning: "The peer's lease is rejected; this node sends " +
			"nothing to it."},
		{State: leaving, Rank: 5, Label: "leaving", Meaning: "The peer's lease disappeared from the store; the path " +
			"to it is kept briefly."},
		{State: notPinged, Rank: 6, Label: "not pinged", Meaning: "The peer was not pinged yet, or cannot be."},
	}
}

// step is a range of round-trip times with its own shade.
type step struct {
	Label string
	Count int
	below time.Duration
}

func steps() []step {
	return []step{
		{Label: "< 1 ms", below: time.Millisecond},
		{Label: "< 5 ms", below: 5 * time.Millisecond},
		{Label: "< 20 ms", below: 20 * time.Millisecond},
		{Label: "< 100 ms", below: 100 * time.Millisecond},
		{Label: "100 ms or more", below: 1<<63 - 1},
	}
}

// pings are the last pings of one size.
type pings struct {
	Sent int    `json:"sent"`
	Lost int    `json:"lost"`
	RTT  string `json:"rtt,omitempty"`
}

// peer is one tile, one row of the table, and its details.
type peer struct {
	Name     string `json:"name,omitempty"`
	ID       string `json:"id,omitempty"`
	Subnet   string `json:"subnet"`
	PublicIP string `json:"ip,omitempty"`
	Path     string `json:"path"`
	Reason   string `json:"reason,omitempty"`
	MAC      string `json:"mac,omitempty"`
	State    state  `json:"state"`
	Step     int    `json:"step"` // index of the step of its RTT
	RTT      string `json:"rtt,omitempty"`
	Nanos    int64  `json:"ns,omitempty"` // RTT, for sorting
	Address  string `json:"address,omitempty"`
	Small    *pings `json:"small,omitempty"`
	Full     *pings `json:"full,omitempty"`
	Last     string `json:"lastAnswer,omitempty"`

	Label string `json:"-"` // of the state
	Loss  string `json:"-"`
	rank  int
}

// peerViews converts peers for display, in the same order.
func peerViews(all []status.Peer, now time.Time) []peer {
	out, known, steps := make([]peer, 0, len(all)), map[state]legendItem{}, steps()
	for _, s := range states() {
		known[s.State] = s
	}
	for _, p := range all {
		v := peer{
			Name: status.Shorten(p.Name, status.ShortText), ID: status.Shorten(p.ID, status.ShortText),
			Subnet: status.Shorten(p.Subnet, status.ShortText), PublicIP: status.Shorten(p.PublicIP, status.ShortText),
			Path: p.Path, Reason: status.Shorten(p.Reason, status.LongText), MAC: p.MAC,
			State: stateOf(p),
		}
		v.Label, v.rank = known[v.State].Label, known[v.State].Rank
		if b := p.Probe; b != nil {
			rtt := max(b.Small.RTT, b.Full.RTT)
			if v.State == silent {
				rtt = 0 // outdated
			}
			v.Address, v.Nanos, v.RTT = b.Address, int64(rtt), status.Short(rtt)
			v.Small, v.Full = pingsView(b.Small), pingsView(b.Full)
			v.Step = slices.IndexFunc(steps, func(s step) bool { return rtt < s.below })
			v.Loss = lossText(b.Small) + " / " + lossText(b.Full)
			if !b.Last.IsZero() {
				v.Last = status.Ago(now, b.Last)
			}
		}
		out = append(out, v)
	}
	return out
}

func stateOf(p status.Peer) state {
	switch {
	case p.Path == "rejected":
		return rejected
	case p.Leaving:
		return leaving
	case p.Path == "unreachable":
		return unreachable
	case p.Probe == nil || p.Probe.Verdict == status.NotPinged:
		return notPinged
	}
	return state(p.Probe.Verdict)
}

func pingsView(p status.Pings) *pings {
	return &pings{Sent: p.Sent, Lost: p.Lost, RTT: status.Short(p.RTT)}
}

func lossText(p status.Pings) string {
	return strconv.Itoa(p.Lost) + " of " + strconv.Itoa(p.Sent)
}

// worstFirst sorts peers by state, then by round-trip time.
func worstFirst(peers []peer) {
	slices.SortStableFunc(peers, func(a, b peer) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(b.Nanos, a.Nanos))
	})
}

// rows renders the table. The template takes six times the time and memory, which matters with thousands of peers;
// everything that is not a constant is escaped.
func rows(peers []peer) template.HTML {
	var b bytes.Buffer
	for _, p := range peers {
		b.WriteString("<tr><td><i class=\"tile ")
		template.HTMLEscape(&b, []byte(p.State))
		b.WriteString(" r" + strconv.Itoa(p.Step) + "\"></i>")
		for i, text := range [...]string{p.Label, p.Name, p.Subnet, p.PublicIP, p.Path, p.RTT, p.Loss, p.Reason} {
			if i > 0 {
				b.WriteString("<td>")
			}
			template.HTMLEscape(&b, []byte(text))
			b.WriteString("</td>")
		}
		b.WriteString("</tr>\n")
	}
	return template.HTML(b.String())
}

// legend counts peers by state, and those that answer by round-trip time.
func legend(peers []peer) ([]legendItem, []step) {
	items, steps := states(), steps()
	for _, p := range peers {
		items[slices.IndexFunc(items, func(i legendItem) bool { return i.State == p.State })].Count++
		if p.State == answers {
			steps[p.Step].Count++
		}
	}
	return items, steps
}
