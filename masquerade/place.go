package masquerade

import (
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// hookRule is one rule of a hook's chain, of which most are other programs'.
type hookRule struct {
	text   string // of a rule of iptables-legacy, as iptables prints it
	handle uint64 // of a rule of nf_tables; 0 if it could not be read
	calls  bool   // it jumps or goes to our chain
	plain  bool   // it is a jump without a condition
	kind   ruleKind
}

// ruleKind is what a rule means for the place of our jump in FORWARD.
type ruleKind uint8

const (
	decides ruleKind = iota // about some packets: our jump stands behind it
	logs                    // it only logs, how often it may be
	policy                  // it ends the chain for every packet, with no accept: the chain's policy by another name
)

// hookChain is the chain of a hook, in order.
type hookChain []hookRule

func (h hookChain) jumps() hookChain { return h.only(true) }

func (h hookChain) others() hookChain { return h.only(false) }

func (h hookChain) only(calls bool) hookChain {
	return slices.DeleteFunc(slices.Clone(h), func(r hookRule) bool { return r.calls != calls })
}

// jumpFault tells what is wrong with the jump to our chain, if anything.
func (h hookChain) jumpFault(p Place) DriftKind {
	jumps := h.jumps()
	switch is, should := h.place(p); {
	case len(jumps) == 0:
		return JumpMissing
	case len(jumps) > 1:
		return JumpRepeated
	case is != should:
		return JumpMisplaced
	case !jumps[0].plain:
		return JumpChanged
	}
	return ""
}

// place is how many rules of others the first jump to our chain stands behind, and how many it has to. In FORWARD these
// are all: our accepts are for packets that no other rule has decided about. A policy rule ends the chain for every
// packet: ours come before it, whatever another program has put behind it in vain. Where such a rule was put in front
// of our jump, it counts as that only if nothing else follows it: an operator can stop all traffic for a while.
func (h hookChain) place(p Place) (is, should int) {
	if is = slices.IndexFunc(h, func(r hookRule) bool { return r.calls }); is < 0 {
		is = 0
	}
	if p.Hook != Forward {
		return is, 0
	}
	others := h.others()
	isPolicy := func(r hookRule) bool { return r.kind == policy }
	if first := slices.IndexFunc(others, isPolicy); first >= 0 && is <= first {
		return is, others[:first].beforeLogs()
	}
	should = len(others)
	for should > 0 && isPolicy(others[should-1]) {
		should--
	}
	if should < len(others) {
		should = others[:should].beforeLogs()
	}
	return is, should
}

// beforeLogs is how many rules stand before those that log what the policy behind them takes. They would report packets
// as dropped which we accept.
func (h hookChain) beforeLogs() int {
	n := len(h)
	for n > 0 && h[n-1].kind == logs {
		n--
	}
	return n
}

// readRule reads a rule of nf_tables, which iptables-nft or nft has made.
func readRule(r *nftables.Rule, chain string) hookRule {
	out := hookRule{handle: r.Handle}
	var ends, logged, limited, jumps, more bool
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Counter:
		case *expr.Verdict:
			out.calls = e.Chain == chain
			jumps = e.Kind == expr.VerdictJump
			ends = e.Kind == expr.VerdictDrop || e.Kind == expr.VerdictReturn
			more = more || !ends && !out.calls
		case *expr.Objref:
			more = more || e.Type != nftCounter
		case *expr.Reject:
			ends = true
		case *expr.Log:
			logged = true
		case *expr.Limit:
			limited = true
		case *expr.Match:
			limited = limited || e.Name == "limit"
			more = more || e.Name != "limit" && e.Name != "comment"
		case *expr.Target:
			ends = e.Name == "REJECT"
			logged = logged || e.Name == "LOG" || e.Name == "NFLOG"
			more = more || !ends && !logged
		default:
			more = true
		}
	}
	switch {
	case more:
	case out.calls:
		out.plain = jumps && !limited && !logged
	case ends && !limited:
		out.kind = policy
	case logged && !ends:
		out.kind = logs
	}
	return out
}

// nftCounter is the type of named counters (NFT_OBJECT_COUNTER of uapi/linux/netfilter/nf_tables.h).
const nftCounter = 1

// identity tells rules apart: the expressions as the kernel has them, and the comment. Counters count.
func identity(r *nftables.Rule) string {
	var b strings.Builder
	for _, e := range r.Exprs {
		if _, counts := e.(*expr.Counter); counts {
			continue
		}
		bytes, err := expr.Marshal(byte(r.Table.Family), e)
		if err != nil {
			return err.Error()
		}
		b.Write(bytes)
	}
	b.Write(r.UserData)
	return b.String()
}

// A jump is moved moveBurst times at once, and then every MoveEvery.
const (
	moveBurst = 10
	// MoveEvery is when to compare again after a JumpContested.
	MoveEvery = 5 * time.Second
)
