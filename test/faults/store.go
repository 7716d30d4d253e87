package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/test/lab"
)

const (
	prefix  = "/overlayd/network/"
	subnets = prefix + "subnets/"
	// storeWait bounds one action in the lab's etcd, which may hang.
	storeWait = 20 * time.Second
)

// withStore runs f with a client of the lab's etcd.
func (s *Site) withStore(ctx context.Context, f func(context.Context, *clientv3.Client) error) error {
	cli, err := s.Lab.EtcdClient()
	if err != nil {
		return err
	}
	defer cli.Close()
	ctx, cancel := context.WithTimeout(ctx, storeWait)
	defer cancel()
	return f(ctx, cli)
}

// Store is an action in etcd.
func Store(f func(context.Context, *Site, *clientv3.Client) error) Action {
	return func(ctx context.Context, s *Site) error {
		return s.withStore(ctx, func(ctx context.Context, cli *clientv3.Client) error { return f(ctx, s, cli) })
	}
}

// put writes a key and returns etcd's revision.
func (s *Site) put(ctx context.Context, key, value string, opts ...clientv3.OpOption) (revision int64, err error) {
	err = s.withStore(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		resp, err := cli.Put(ctx, key, value, opts...)
		if err == nil {
			revision = resp.Header.Revision
		}
		return err
	})
	return revision, err
}

// Put writes a key.
func Put(key, value func(*Site) string) Action {
	return func(ctx context.Context, s *Site) error {
		_, err := s.put(ctx, key(s), value(s))
		return err
	}
}

// Delete deletes a key, or others with it.
func Delete(key func(*Site) string, opts ...clientv3.OpOption) Action {
	return Store(func(ctx context.Context, s *Site, cli *clientv3.Client) error {
		_, err := cli.Delete(ctx, key(s), opts...)
		return err
	})
}

// storedLease is a lease as it stands in etcd.
type storedLease struct {
	key, value string
	etcdLease  clientv3.LeaseID
}

// leaseOf finds a node's lease in etcd.
func (s *Site) leaseOf(ctx context.Context, n *lab.Node) (storedLease, error) {
	var out storedLease
	err := s.withStore(ctx, func(ctx context.Context, cli *clientv3.Client) error {
		resp, err := cli.Get(ctx, subnets, clientv3.WithPrefix())
		if err != nil {
			return fmt.Errorf("read the leases: %w", err)
		}
		for _, kv := range resp.Kvs {
			var v struct{ NodeName string }
			if json.Unmarshal(kv.Value, &v) == nil && v.NodeName == n.Name {
				out = storedLease{string(kv.Key), string(kv.Value), clientv3.LeaseID(kv.Lease)}
				return nil
			}
		}
		return fmt.Errorf("%s has no lease in etcd", n.Name)
	})
	return out, err
}

// registered holds when every node has the lease in etcd that its subnet.env speaks of, on an etcd lease.
func registered(ctx context.Context, s *Site) error {
	return s.everyNode(func(n *lab.Node) error {
		l, err := s.leaseOf(ctx, n)
		if err != nil {
			return err
		}
		env, err := n.SubnetEnv()
		if err != nil {
			return err
		}
		var own addr.Per[netip.Prefix]
		for _, f := range s.families {
			own.Set(f, env.Gateway.Get(f).Masked())
		}
		return unless(l.key == subnets+subnet.FormatKey(own) && l.etcdLease != 0,
			"the lease of %s is at %s (etcd lease %x), its subnet.env says %s", n.Name, l.key, int64(l.etcdLease),
			subnet.FormatKey(own))
	})
}

// ghost is a node that exists in etcd alone.
type ghost uint8

func (g ghost) subnets(s *Site) addr.Per[netip.Prefix] {
	var out addr.Per[netip.Prefix]
	for _, f := range s.families {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(g), 0}), 24)
		if f == addr.IPv6 {
			p = netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%x::/64", 0xff00+int(g)))
		}
		out.Set(f, p)
	}
	return out
}

// host is the last part of its addresses.
func (g ghost) host() string { return fmt.Sprint(uint8(g)) }

func (g ghost) key(s *Site) string { return subnets + subnet.FormatKey(g.subnets(s)) }

// value is a lease that makes sense: in the victim's own segment, so that it can be reached without a tunnel as well.
func (g ghost) value(s *Site) string {
	v := map[string]any{
		"BackendType": s.Lab.Topology().Options.Backend, "NodeName": fmt.Sprintf("ghost%d", uint8(g)),
		"NodeID": fmt.Sprintf("%032x", uint8(g)), "PublicIPLocal": true,
	}
	for _, f := range s.families {
		name, data := "PublicIP", "BackendData"
		if f == addr.IPv6 {
			name, data = "PublicIPv6", "BackendV6Data"
		}
		v[name] = elsewhere(s, f, g.host()).Addr()
		v[data] = map[string]any{"VNI": 1, "VtepMAC": fmt.Sprintf("02:00:00:00:%02x:%02x", uint8(f), uint8(g))}
	}
	raw, _ := json.Marshal(v) // strings and numbers only
	return string(raw)
}

// appears puts the ghost's lease into etcd; the row's end takes it away.
func (g ghost) appears(ctx context.Context, s *Site) error {
	s.Defer(g.goes)
	return g.returns(ctx, s)
}

func (g ghost) returns(ctx context.Context, s *Site) error { return Put(g.key, g.value)(ctx, s) }

func (g ghost) goes(ctx context.Context, s *Site) error { return Delete(g.key)(ctx, s) }

// routed holds when every node has a route to the ghost's subnet, routedHere when the victim has.
func (g ghost) routed(ctx context.Context, s *Site) error {
	return s.everyNode(func(n *lab.Node) error { return g.routedOn(ctx, s, n) })
}

func (g ghost) routedHere(ctx context.Context, s *Site) error { return g.routedOn(ctx, s, s.Victim) }

func (g ghost) routedOn(ctx context.Context, s *Site, n *lab.Node) error {
	return s.everyFamily(func(f addr.Family) error {
		to := g.subnets(s).Get(f).String()
		out, err := n.Run(ctx, "ip", fmt.Sprintf("-%d", uint8(f)), "route", "show", to)
		return errors.Join(err, unless(out != "", "%s has no route to %s", n.Name, to))
	})
}

// stopStore, startStore and the like do something to all members of etcd.
func stopStore(ctx context.Context, s *Site) error {
	return eachMember(s, func(e *lab.Etcd) error { return e.Stop(ctx) })
}

func startStore(ctx context.Context, s *Site) error {
	ctx, cancel := context.WithTimeout(ctx, storeWait)
	defer cancel()
	err := eachMember(s, func(e *lab.Etcd) error {
		if e.Running() {
			return nil
		}
		return e.Start()
	})
	if err != nil {
		return err
	}
	return eachMember(s, func(e *lab.Etcd) error { return e.WaitReady(ctx) })
}

func pauseStore(_ context.Context, s *Site) error  { return eachMember(s, (*lab.Etcd).Pause) }
func resumeStore(_ context.Context, s *Site) error { return eachMember(s, (*lab.Etcd).Resume) }

func eachMember(s *Site, f func(*lab.Etcd) error) error {
	var errs []error
	for _, e := range s.Lab.EtcdMembers() {
		errs = append(errs, f(e))
	}
	return errors.Join(errs...)
}

// withData stops etcd, runs a shell script with its data in $DATA, and starts it. The copies are made by another
// process: a program that this one writes can't be run while a child that was forked meanwhile still holds the
// descriptor.
func withData(script string) Action {
	return Steps(stopStore, func(ctx context.Context, s *Site) error {
		return eachMember(s, func(e *lab.Etcd) error {
			_, err := e.Shell(ctx, script, "DATA="+e.DataDir())
			return err
		})
	}, startStore)
}

// emptyStore starts etcd with nothing in it.
func emptyStore(ctx context.Context, s *Site) error { return withData(`rm -r $DATA`)(ctx, s) }

// copyStore keeps a copy of etcd's data, and rollBack puts it in their place.
func copyStore(ctx context.Context, s *Site) error {
	return withData(`rm -rf $DATA.backup; cp -a $DATA $DATA.backup`)(ctx, s)
}

func rollBack(ctx context.Context, s *Site) error {
	return withData(`rm -r $DATA; cp -a $DATA.backup $DATA`)(ctx, s)
}

// olderStore makes a copy of etcd's data in which the victim has no lease. All that nodes notice is an interruption.
func olderStore(ctx context.Context, s *Site) error {
	const cut, join = `iptables -I INPUT -i eth0 -j DROP; iptables -I OUTPUT -o eth0 -j DROP`, `iptables -F`
	return Steps(
		Afterwards(once(store, join)), once(store, cut),
		withData(`rm -rf $DATA.with; cp -a $DATA $DATA.with`), deleteOwnKey,
		withData(`rm -rf $DATA.backup; mv $DATA $DATA.backup; mv $DATA.with $DATA`), once(store, join),
	)(ctx, s)
}
