package agent

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// writeIfChanged puts a file in place in one step, so that no reader ever sees half of it; a file that says so already is left alone.
func writeIfChanged(path string, content []byte) error {
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, content) {
		return nil
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// subnetEnv is the file that CNI plugins and scripts read. Every variable stands there twice: with the name that those written
// for flannel look for, and with our own.
func subnetEnv(c subnet.Config, l subnet.Lease, mtu int, ipMasq bool) []byte {
	type variable struct{ name, value string }
	var vars []variable
	for _, f := range c.Families() {
		prefix := map[addr.Family]string{addr.IPv4: "", addr.IPv6: "IPV6_"}[f]
		sn := l.Subnets.Get(f)
		vars = append(vars,
			variable{prefix + "NETWORK", c.Pools.Get(f).Network.String()},
			// The bridge's own address; the one before it is the tunnel device's.
			variable{prefix + "SUBNET", netip.PrefixFrom(sn.Addr().Next(), sn.Bits()).String()})
	}
	vars = append(vars, variable{"MTU", strconv.Itoa(mtu)}, variable{"IPMASQ", strconv.FormatBool(ipMasq)})
	var b strings.Builder
	for _, prefix := range []string{"FLANNEL_", "OVERLAYD_"} {
		for _, v := range vars {
			fmt.Fprintf(&b, "%s%s=%s\n", prefix, v.name, v.value)
		}
	}
	return []byte(b.String())
}

// stateDir is what a node remembers across restarts.
type stateDir string

// memory is the content of the state directory's lease.json.
type memory struct {
	Subnets string // in the form of a lease's key
}

func (d stateDir) leaseFile() string { return filepath.Join(string(d), "lease.json") }

// load returns the subnets that this node had last, if it remembers any.
func (d stateDir) load() (addr.Per[netip.Prefix], error) {
	raw, err := os.ReadFile(d.leaseFile())
	if errors.Is(err, os.ErrNotExist) {
		return addr.Per[netip.Prefix]{}, nil
	}
	if err != nil {
		return addr.Per[netip.Prefix]{}, err
	}
	var m memory
	if err := json.Unmarshal(raw, &m); err != nil {
		return addr.Per[netip.Prefix]{}, fmt.Errorf("%s: %w", d.leaseFile(), err)
	}
	sn, err := subnet.ParseKey(m.Subnets)
	if err != nil {
		return addr.Per[netip.Prefix]{}, fmt.Errorf("%s: %w", d.leaseFile(), err)
	}
	return sn, nil
}

func (d stateDir) save(sn addr.Per[netip.Prefix]) error {
	raw, err := json.Marshal(memory{Subnets: subnet.FormatKey(sn)})
	if err != nil {
		return err
	}
	return writeIfChanged(d.leaseFile(), append(raw, '\n'))
}

// ErrRunning says that another daemon works on this node.
var ErrRunning = errors.New("another overlayd is running on this node")

// Lock keeps a second daemon off the state directory until the returned function is called or the process ends.
func Lock(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := os.ReadFile(path)
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w (process %s holds %s)", ErrRunning, strings.TrimSpace(string(holder)), path)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	_ = f.Truncate(0)
	_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return func() { _ = f.Close() }, nil
}

// LeaseFile is where the state directory says which subnets the node had last.
func LeaseFile(dir string) string { return stateDir(dir).leaseFile() }
