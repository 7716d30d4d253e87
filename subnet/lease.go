package subnet

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"unicode"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/jsonobject"
)

// Lease is a node's hold on its pod subnets, with what the others must know to reach it.
type Lease struct {
	Subnets addr.Per[netip.Prefix]
	Attrs
}

// Attrs is what a node says of itself in its lease.
type Attrs struct {
	PublicIP      addr.Per[netip.Addr] // its address on the underlay
	PublicIPLocal bool                 // PublicIP is configured on the node itself, not on a NAT before it
	Backend       BackendType
	VTEP          addr.Per[VTEP] // where Backend is vxlan
	PublicKey     PublicKey      // where Backend is wireguard
	Identity
}

// Identity is what makes a node the same node after a restart, whatever its addresses are.
type Identity struct {
	NodeName string // by default the host name
	NodeID   string // by default /etc/machine-id
}

// Check rejects names that a lease could not carry.
func (id Identity) Check() error {
	return errors.Join(checkName("NodeName", id.NodeName), checkName("NodeID", id.NodeID))
}

// VTEP is a node's end of the VXLAN tunnels of one family.
type VTEP struct {
	VNI uint32
	MAC addr.MAC
}

// PublicKey is a public key of WireGuard as wg(8) prints it, in base64; empty: none.
type PublicKey string

// ParsePublicKey checks that a text is 32 bytes in base64.
func ParsePublicKey(s string) (PublicKey, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(b) != publicKeySize || base64.StdEncoding.EncodeToString(b) != s {
		return "", fmt.Errorf("%.60q is not a public key of WireGuard", s)
	}
	return PublicKey(s), nil
}

const publicKeySize = 32 // of Curve25519 (RFC 7748 §6.1)

// SameEnds reports whether peers reach both by the same tunnels.
func (a Attrs) SameEnds(o Attrs) bool { return a.VTEP == o.VTEP && a.PublicKey == o.PublicKey }

// Gateway is the first address of the lease's subnet: that of its VXLAN device, through which routes to it go.
func (l Lease) Gateway(f addr.Family) netip.Addr { return l.Subnets.Get(f).Addr() }

// Name is what to call the node in a message: its name, or its subnet if it has none (a lease of flannel).
func (l Lease) Name() string {
	if l.NodeName != "" {
		return l.NodeName
	}
	return FormatKey(l.Subnets)
}

// Entry is one key of the store's lease table, as it was found there.
type Entry struct {
	Lease
	Key string // without the prefix: "10.244.5.0-24"

	Revision int64 // of the store, at the key's last change
	Created  int64 // of the store, when the key came to be: of two that overlap, the older one holds
	LeaseID  int64 // the etcd lease that the key is attached to; 0: none, the key is a reservation
	NotJSON  bool  // the value is empty, nonsense, or too large to look at

	// Err says why no lease can be read from the key and its value. Subnets is then still what the key takes up, as far
	// as that could be told, so that no node is given the same addresses.
	Err error
}

// Reserved reports whether the entry is a reservation: it stays without being renewed.
func (e *Entry) Reserved() bool { return e.LeaseID == 0 }

// Blank reports whether the entry is a reservation that no node has taken up: it only keeps its subnet from being
// leased. It may name the node that it waits for.
func (e *Entry) Blank() bool {
	return e.Reserved() && e.Err == nil && e.Attrs == Attrs{Identity: Identity{NodeName: e.NodeName}}
}

// ErrBlank is why a lease with an empty value is rejected; a reservation may be empty.
var ErrBlank = errors.New("the value is empty")

// MaxValueSize is how many bytes the value of a lease may have: far more than one needs.
const MaxValueSize = 16 << 10

const maxNameLen = 253 // RFC 1035 §2.3.4; machine-id(5) has 32

// FormatKey is the name of the key under PREFIX/subnets/ that holds these subnets.
func FormatKey(s addr.Per[netip.Prefix]) string {
	var buf [maxKeyLen]byte
	return string(appendKey(buf[:0], s))
}

const maxKeyLen = len("255.255.255.255-32&ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff-128")

func appendKey(b []byte, s addr.Per[netip.Prefix]) []byte {
	for _, f := range addr.Families() {
		p := s.Get(f)
		if !p.IsValid() {
			continue
		}
		if len(b) > 0 {
			b = append(b, '&')
		}
		b = append(p.Addr().AppendTo(b), '-')
		b = strconv.AppendInt(b, int64(p.Bits()), 10)
	}
	return b
}

// ParseKey reads the name of a key. With an error, it still returns the subnets that it could make out.
func ParseKey(key string) (addr.Per[netip.Prefix], error) {
	var out addr.Per[netip.Prefix]
	bad := len(key) > maxNameLen
	parts := 0
	for part := range strings.SplitSeq(key, "&") {
		at := strings.LastIndexByte(part, '-')
		if at < 0 || parts > 1 {
			bad = true
			break
		}
		parts++
		p, err := netip.ParsePrefix(part[:at] + "/" + part[at+1:])
		if err != nil || p.Addr().Is4In6() {
			bad = true
			continue
		}
		f := addr.FamilyOf(p.Addr())
		bad = bad || out.Get(f).IsValid()
		out.Set(f, p.Masked())
	}
	var buf [maxKeyLen]byte
	if bad || string(appendKey(buf[:0], out)) != key {
		const form = "ADDRESS-LENGTH or IPV4-LENGTH&IPV6-LENGTH with no host bits set"
		return out, fmt.Errorf("the key %.80q is not of the form %s", key, form)
	}
	return out, nil
}

// wireLease is the value as it stands in the store, in flannel's layout plus our own last three.
type wireLease struct {
	PublicIP      string          `json:",omitempty"`
	PublicIPv6    string          `json:",omitempty"`
	BackendType   BackendType     `json:",omitempty"`
	BackendData   json.RawMessage `json:",omitempty"`
	BackendV6Data json.RawMessage `json:",omitempty"`
	NodeName      string          `json:",omitempty"`
	NodeID        string          `json:",omitempty"`
	PublicIPLocal bool            `json:",omitempty"`
}

type wireVTEP struct {
	VNI       uint32 `json:",omitempty"`
	VtepMAC   string `json:",omitempty"`
	PublicKey string `json:",omitempty"`
}

// FormatValue is the value that says a; equal attributes give equal bytes.
func FormatValue(a Attrs) []byte {
	w := struct { // a wireLease whose parts are encoded with it: thousands are written to the persisted state
		PublicIP      string      `json:",omitempty"`
		PublicIPv6    string      `json:",omitempty"`
		BackendType   BackendType `json:",omitempty"`
		BackendData   *wireVTEP   `json:",omitempty"`
		BackendV6Data *wireVTEP   `json:",omitempty"`
		NodeName      string      `json:",omitempty"`
		NodeID        string      `json:",omitempty"`
		PublicIPLocal bool        `json:",omitempty"`
	}{
		BackendType: a.Backend, NodeName: a.NodeName, NodeID: a.NodeID, PublicIPLocal: a.PublicIPLocal,
		BackendData: a.formatEnd(addr.IPv4), BackendV6Data: a.formatEnd(addr.IPv6),
	}
	if a.PublicIP.V4.IsValid() {
		w.PublicIP = a.PublicIP.V4.String()
	}
	if a.PublicIP.V6.IsValid() {
		w.PublicIPv6 = a.PublicIP.V6.String()
	}
	return mustJSON(w)
}

// formatEnd says where tunnels of one family end. A key is said in each family of the node, as flannel does.
func (a Attrs) formatEnd(f addr.Family) *wireVTEP {
	v := a.VTEP.Get(f)
	switch {
	case a.PublicKey != "" && a.PublicIP.Get(f).IsValid():
		return &wireVTEP{PublicKey: string(a.PublicKey)}
	case v == VTEP{}:
		return nil
	}
	return &wireVTEP{VNI: v.VNI, VtepMAC: v.MAC.String()}
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // the types above hold nothing that JSON cannot say
		panic(err) //nolint:forbidigo // it can't happen
	}
	return b
}

// ParseValue reads a lease's value. A value without content gives ErrBlank.
func ParseValue(data []byte) (Attrs, error) {
	if len(data) > MaxValueSize {
		return Attrs{}, fmt.Errorf("the value has more than %d bytes", MaxValueSize)
	}
	if s := bytes.TrimSpace(data); len(s) == 0 || string(s) == "{}" || string(s) == "null" {
		return Attrs{}, ErrBlank
	}
	w, err := read(data, scanLease)
	if err != nil {
		return Attrs{}, fmt.Errorf("the value is not a lease: %s", inWords(err, data))
	}
	return w.attrs()
}

// inWords says what is wrong with a piece of JSON without the names of this program's types.
func inWords(err error, data []byte) string {
	wrong := (*json.UnmarshalTypeError)(nil)
	switch {
	case !errors.As(err, &wrong):
		return fmt.Sprintf("%.200s", err.Error())
	case wrong.Field == "":
		return fmt.Sprintf("expected a JSON object, found %s", jsonobject.Excerpt(data))
	}
	return fmt.Sprintf("%s: expected %s, found a JSON %s", wrong.Field, expected(wrong.Type.Kind()), wrong.Value)
}

func expected(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Struct:
		return "an object"
	}
	return "a number"
}

// read reads JSON in the one layout that fast knows, or else in any.
func read[T any](data []byte, fast func([]byte) (T, bool)) (T, error) {
	if v, ok := fast(data); ok {
		return v, nil
	}
	var v T
	err := json.Unmarshal(data, &v)
	return v, err
}

// attrs checks what the value says. Nothing in the outcome shares memory with the value.
func (w wireLease) attrs() (Attrs, error) {
	a := Attrs{PublicIPLocal: w.PublicIPLocal, Backend: w.BackendType, Identity: Identity{w.NodeName, w.NodeID}}
	err := joined(
		checkName("NodeName", w.NodeName), checkName("NodeID", w.NodeID), checkName("BackendType", string(w.BackendType)),
		parsePublicIP(&a.PublicIP, addr.IPv4, "PublicIP", w.PublicIP),
		parsePublicIP(&a.PublicIP, addr.IPv6, "PublicIPv6", w.PublicIPv6),
	)
	if w.BackendType == VXLAN || w.BackendType == WireGuard { // another backend's data are its own affair
		err = joined(err,
			a.parseEnd(addr.IPv4, "BackendData", w.BackendData), a.parseEnd(addr.IPv6, "BackendV6Data", w.BackendV6Data))
	}
	return a, err
}

// checkName rejects what can't be printed on a terminal as it is.
func checkName(field, s string) error {
	if len(s) > maxNameLen || strings.ContainsFunc(s, unprintable) {
		const wrong = "is longer than %d bytes or has characters that cannot be printed"
		return fmt.Errorf("%s: %.40q "+wrong, field, s, maxNameLen)
	}
	return nil
}

func unprintable(r rune) bool {
	return r < ' ' || r > '~' && (!unicode.IsPrint(r) || r == unicode.ReplacementChar) // between them all is printable
}

func parsePublicIP(out *addr.Per[netip.Addr], f addr.Family, field, s string) error {
	if s == "" {
		return nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil || addr.FamilyOf(a) != f || a.Zone() != "" || a.Is4In6() {
		return fmt.Errorf("%s: %.40q is not an %s address", field, s, f.String())
	}
	if a.IsUnspecified() { // what flannel writes for "none"
		return nil
	}
	out.Set(f, a)
	return nil
}

func (a *Attrs) parseEnd(f addr.Family, field string, raw json.RawMessage) error {
	if len(raw) == 0 || string(raw) == "null" {
		return nil
	}
	w, err := read(raw, scanVTEP)
	if err != nil {
		return fmt.Errorf("%s: not the data of a %s lease: %s", field, a.Backend, inWords(err, raw))
	}
	switch {
	case a.Backend == WireGuard && w.PublicKey == "", a.Backend == VXLAN && w.VtepMAC == "" && w.VNI == 0:
		return nil
	case a.Backend == WireGuard:
		k, err := ParsePublicKey(w.PublicKey)
		if err != nil {
			return fmt.Errorf("%s.PublicKey: %w", field, err)
		}
		if a.PublicKey != "" && a.PublicKey != k {
			return fmt.Errorf("%s.PublicKey: %q is another key than %q of the other family", field, k, a.PublicKey)
		}
		a.PublicKey = k
		return nil
	}
	m, err := addr.ParseMAC(w.VtepMAC)
	if err != nil {
		return fmt.Errorf("%s.VtepMAC: %w", field, err)
	}
	a.VTEP.Set(f, VTEP{VNI: w.VNI, MAC: m})
	return nil
}

// ParseEntry reads one key and its value; what is wrong with them is the entry's Err. An entry is never changed: two
// that are the same pointer are equal.
func ParseEntry(key string, value []byte, revision, created, leaseID int64) *Entry {
	e := &Entry{Key: key, Revision: revision, Created: created, LeaseID: leaseID}
	e.Subnets, e.Err = ParseKey(key)
	a, err := ParseValue(value)
	e.NotJSON = err != nil && (len(value) > MaxValueSize || !json.Valid(value))
	if errors.Is(err, ErrBlank) && e.Reserved() {
		return e
	}
	if err == nil {
		e.Attrs = a
	}
	e.Err = joined(e.Err, err)
	return e
}
