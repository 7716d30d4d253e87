package masquerade

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Kind says which firewall holds the rules.
type Kind string

// The kinds.
const (
	KindAuto     Kind = "auto" // what the host and kube-proxy use
	KindIPTables Kind = "iptables"
	KindNFTables Kind = "nftables"
)

// ParseKind reads a kind from a flag.
func ParseKind(s string) (Kind, error) {
	switch k := Kind(s); k {
	case KindAuto, KindIPTables, KindNFTables:
		return k, nil
	}
	return "", fmt.Errorf("%q is not a firewall: expected auto, iptables or nftables", s)
}

// Options are what a driver is made of.
type Options struct {
	Kind    Kind
	Variant Variant       // of iptables; VariantDefault: what the host uses
	Wait    time.Duration // for the xtables lock; zero: DefaultWait
	Sets    Sets
	Watch   Watch  // nil: nothing is heard, look each time
	Kernel  Kernel // nil: iptables has to say what is there
}

// New makes the driver that the options ask for. Where they leave a choice, the host is looked at once. That starts no process
// but where there are tables of iptables-legacy, or where it seems that the answer is nftables.
func New(ctx context.Context, o Options) (Driver, Decision) {
	h := newHost(o.Kernel)
	d := Decision{o.Kind, o.Variant, "as configured"}
	if o.Kind == KindAuto || o.Kind == KindIPTables && o.Variant == VariantDefault {
		d = Decide(o.Kind, o.Variant, gather(ctx, h, o.Kind))
	}
	if d.Kind == KindNFTables {
		n := NewNFTables(o.Wait)
		n.use(h)
		n.sets, n.memory.watch = o.Sets, o.Watch
		return n, d
	}
	i := NewIPTables(d.Variant, o.Wait)
	i.host, i.sets, i.memory.watch = h, o.Sets, o.Watch
	return i, d
}

// Begin is New beside what the caller goes on to do: chosen is told the decision, from another goroutine, and the driver waits
// for it. Until then the driver alone may use what is in the options.
func Begin(ctx context.Context, o Options, chosen func(Decision)) Driver {
	l := &later{done: make(chan struct{})}
	go func() {
		defer close(l.done)
		var d Decision
		l.driver, d = New(ctx, o)
		chosen(d)
	}()
	return l
}

// later is a driver that is being chosen.
type later struct {
	done   chan struct{}
	driver Driver
}

func (l *later) get() Driver {
	<-l.done // soon: what New does ends with its context
	return l.driver
}

func (l *later) Ensure(ctx context.Context, want []Ruleset) (Result, error) {
	return l.get().Ensure(ctx, want)
}

func (l *later) Remove(ctx context.Context) error { return l.get().Remove(ctx) }

func (l *later) Notified() bool { return l.get().Notified() }

// Remove takes everything of ours out of every firewall, and the sets.
func Remove(ctx context.Context, wait time.Duration, sets Sets) error {
	d := NewIPTables(VariantDefault, wait)
	d.sets = sets
	return d.Remove(ctx)
}

// Decision is which driver to use, and why.
type Decision struct {
	Kind    Kind // never KindAuto
	Variant Variant
	Reason  string
}

// Facts are what a decision rests on. What could not be found out is taken for not there, and so is what makes no difference.
type Facts struct {
	NFT          bool // nft works
	KubeProxyNFT bool // kube-proxy has a table in nftables
	IPTablesNFT  VariantFacts
	Legacy       VariantFacts
}

// nftMatters tells whether it makes a difference if nft works.
func (f Facts) nftMatters(k Kind) bool {
	return k == KindAuto && (f.KubeProxyNFT || !f.IPTablesNFT.Program && !f.Legacy.Program)
}

// variantsMatter tells whether it makes a difference who uses which variant.
func (f Facts) variantsMatter() bool {
	return f.NFT && f.KubeProxyNFT || f.IPTablesNFT.Program && f.Legacy.Program
}

// rulesMatter tells whether it makes a difference how many rules there are.
func (f Facts) rulesMatter() bool {
	return f.variantsMatter() && f.IPTablesNFT.KubeProxy == f.Legacy.KubeProxy && f.IPTablesNFT.Kubelet == f.Legacy.Kubelet
}

// VariantFacts are about one variant of iptables, both families together.
type VariantFacts struct {
	Program   bool // is there
	KubeProxy bool // kube-proxy has its chains here
	Kubelet   bool // the kubelet says that this is the variant to use
	Rules     int  // that are not ours
}

// Decide chooses. In doubt it is iptables: that is what most of what has to live beside us uses.
func Decide(k Kind, v Variant, f Facts) Decision {
	if k == KindAuto {
		var reason string
		if k, reason = decideKind(f); k == KindNFTables {
			return Decision{k, v, reason}
		}
	}
	if k == KindNFTables {
		return Decision{k, v, "as configured"}
	}
	if v != VariantDefault {
		return Decision{k, v, "variant as configured"}
	}
	v, reason := decideVariant(f)
	return Decision{KindIPTables, v, reason}
}

func decideKind(f Facts) (Kind, string) {
	switch {
	case !f.NFT:
		return KindIPTables, "nft does not work here"
	case !f.IPTablesNFT.Program && !f.Legacy.Program:
		return KindNFTables, "there is no iptables here"
	case f.KubeProxyNFT && !f.IPTablesNFT.KubeProxy && !f.Legacy.KubeProxy:
		return KindNFTables, "kube-proxy uses nftables"
	}
	return KindIPTables, "nobody asks for nftables"
}

// decideVariant asks in the order in which the Kubernetes images do (kubernetes-sigs/iptables-wrappers): the kubelet's
// hint, then where the rules are.
func decideVariant(f Facts) (Variant, string) {
	nft, legacy := f.IPTablesNFT, f.Legacy
	switch {
	case !nft.Program && !legacy.Program:
		return VariantDefault, "whatever the host calls iptables"
	case !legacy.Program:
		return VariantNFT, "there is no iptables-legacy here"
	case !nft.Program:
		return VariantLegacy, "there is no iptables-nft here"
	case nft.KubeProxy != legacy.KubeProxy:
		return either(nft.KubeProxy), "kube-proxy uses it"
	case nft.Kubelet != legacy.Kubelet:
		return either(nft.Kubelet), "the kubelet uses it"
	case nft.Rules != legacy.Rules:
		return either(nft.Rules > legacy.Rules), fmt.Sprintf("most rules on this host are there (nft %d, legacy %d)", nft.Rules, legacy.Rules)
	}
	return VariantDefault, "whatever the host calls iptables"
}

func either(nft bool) Variant {
	if nft {
		return VariantNFT
	}
	return VariantLegacy
}

// gather looks at the host, in the network namespace of the calling thread. It makes nothing by looking.
func gather(ctx context.Context, h host, k Kind) Facts {
	var f Facts
	for _, fam := range addr.Families() {
		f.IPTablesNFT.Program = f.IPTablesNFT.Program || programThere(fam, VariantNFT)
		f.Legacy.Program = f.Legacy.Program || programThere(fam, VariantLegacy)
		_, _, err := h.kernel.Table(fam, "kube-proxy")
		f.KubeProxyNFT = f.KubeProxyNFT || err == nil
	}
	f.NFT = f.nftMatters(k) && h.nftWorks(ctx)
	for _, fam := range addr.Families() {
		if f.variantsMatter() {
			f.IPTablesNFT.find(h, fam)
			f.Legacy.save(ctx, h, fam)
		}
	}
	for _, fam := range addr.Families() {
		if f.rulesMatter() {
			f.IPTablesNFT.count(h, fam)
		}
	}
	return f
}

// What kube-proxy and the kubelet are known by.
const (
	kubeServices = "KUBE-SERVICES"
	kubeHint     = "KUBE-IPTABLES-HINT"
	kubeCanary   = "KUBE-KUBELET-CANARY"
)

// find asks the kernel who uses iptables-nft.
func (v *VariantFacts) find(h host, f addr.Family) {
	there := func(table Table, chain string) bool {
		_, err := h.kernel.Chain(f, string(table), chain)
		return err == nil
	}
	v.KubeProxy = v.KubeProxy || there(NAT, kubeServices) || there(Filter, kubeServices)
	v.Kubelet = v.Kubelet || there(mangle, kubeHint) || there(mangle, kubeCanary)
}

// count counts the rules of iptables-nft.
func (v *VariantFacts) count(h host, f addr.Family) {
	for _, table := range []Table{NAT, Filter, mangle, "raw", "security"} {
		rules, _ := h.kernel.Rules(f, string(table), "")
		for _, line := range ruleLines(rules) {
			if !strings.Contains(line, ourPrefix) {
				v.Rules++
			}
		}
	}
}

// mangle is a table in which there is nothing of ours.
const mangle Table = "mangle"

// save lets iptables-legacy say who uses it, if anybody does: to save its tables makes them.
func (v *VariantFacts) save(ctx context.Context, h host, f addr.Family) {
	if names, _ := legacyNames(f); !programThere(f, VariantLegacy) || len(names) == 0 {
		return
	}
	if out, err := h.run(ctx, "", programName(f, VariantLegacy)+"-save"); err == nil {
		v.read(out)
	}
}

// read reads what iptables-save prints.
func (v *VariantFacts) read(saved string) {
	for line := range strings.Lines(saved) {
		switch {
		case strings.HasPrefix(line, ":"+kubeServices+" "):
			v.KubeProxy = true
		case strings.HasPrefix(line, ":"+kubeHint+" "), strings.HasPrefix(line, ":"+kubeCanary+" "):
			v.Kubelet = true
		case strings.HasPrefix(line, "-A ") && !strings.Contains(line, ourPrefix):
			v.Rules++
		}
	}
}
