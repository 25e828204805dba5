package CPANBridge::JSON::Decoder;

# One pass over the bytes with \G matches on $_, which all advance its position. Strings and simple
# numbers in arrays and objects, which are most of the data, are decoded in the container's own loop.

use 5.010;
use strict;
use warnings;
no warnings 'recursion';

use B ();
use CPANBridge::Boolean;
use CPANBridge::Error;
use POSIX ();

our $VERSION = '0.6.0';

# Constants, not variables, as in CPANBridge::JSON::Encoder: replies are read in global destruction as well.
use constant UNESCAPED => {
    '"' => '"', '\\' => '\\', '/' => '/', b => "\b",
    f => "\f", n => "\n", r => "\r", t => "\t",
};
use constant INFINITY => 9**9**9;

# The digits of the largest unsigned integer (2**64 - 1 on most machines) and of the smallest signed one.
use constant LARGEST  => '' . ~0;
use constant SMALLEST => '' . ((~0 >> 1) + 1);

# Before 5.30, Perl's own conversion could be wrong in the last digit of a float.
use constant READS_EXACTLY => $] >= 5.030;

# Whether strings hold bytes that need decoding, and what true and false are: set for each document.
our ($Wide, $True, $False);

# The data of a JSON document in UTF-8. Dies with a CPANBridge::Error of type InvalidReply.
sub decode {
    my ($bytes) = @_;
    local ($Wide, $True, $False)
        = (_is_wide($bytes), CPANBridge::Boolean::true(), CPANBridge::Boolean::false());
    my $value;
    for ($bytes) {
        $value = _value();
        _fail('something follows the value') if !/\G[ \t\r\n]*\z/gc;
    }
    return $value;
}

# Whether there is anything beyond ASCII. Dies for what is not UTF-8.
sub _is_wide {
    return 0 if $_[0] !~ /[^\x00-\x7f]/;
    my $characters = $_[0];
    if (!utf8::decode($characters) || has_surrogates($_[0])) {
        die CPANBridge::Error->new(message => 'not UTF-8', error_type => 'InvalidReply');
    }
    return 1;
}

# Whether Perl is past the script's end, and has taken away what variables refer to.
sub in_global_destruction {
    return defined ${^GLOBAL_PHASE} ? ${^GLOBAL_PHASE} eq 'DESTRUCT' : !${ B::main_cv() };
}

# Whether UTF-8, as Perl takes it, has surrogates or something above U+10FFFF.
sub has_surrogates {
    return $_[0] =~ /\xed[\xa0-\xbf]/ || $_[0] =~ /\xf4[\x90-\xbf]/ || $_[0] =~ tr/\xf5-\xff//;
}

sub _value {
    /\G[ \t\r\n]+/gc;
    if (/\G"([^"\\\x00-\x1f]*)"/gc) {
        my $string = $1;
        utf8::decode($string) if $Wide;
        return $string;
    }
    return _object() if /\G\{/gc;
    return _array()  if /\G\[/gc;
    return _number($1, $2) if /\G(-?(?:0|[1-9][0-9]*))((?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)/gc;
    return $True     if /\Gtrue/gc;
    return $False    if /\Gfalse/gc;
    return undef     if /\Gnull/gc;
    return _escaped_string() if /\G"/gc;
    _fail('no value');
}

# The number in the long patterns here is one that is no special case by its sign or size.
sub _array {
    my @items;
    return \@items if /\G[ \t\r\n]*\]/gc;
    while (1) {
        if (/\G[ \t\r\n]*(?:"([^"\\\x00-\x1f]*)"|(-?[1-9][0-9]{0,8}(?:\.[0-9]+)?|0(?:\.[0-9]+)?))[ \t\r\n]*([],])/gc) {
            my $end = $3;
            if (defined $2) {
                push @items, READS_EXACTLY ? 0 + $2 : _float($2);
            }
            else {
                push @items, $1;
                utf8::decode($items[-1]) if $Wide;
            }
            return \@items if $end eq ']';
            next;
        }
        push @items, _value();
        next if /\G[ \t\r\n]*,/gc;
        return \@items if /\G[ \t\r\n]*\]/gc;
        _fail("neither ',' nor ']' after an item");
    }
}

sub _object {
    my %pairs;
    return \%pairs if /\G[ \t\r\n]*\}/gc;
    while (1) {
        # The key and colon, and a simple value with what follows it.
        if (/\G[ \t\r\n]*"([^"\\\x00-\x1f]*)"[ \t\r\n]*:[ \t\r\n]*
            (?:(?:"([^"\\\x00-\x1f]*)"|(-?[1-9][0-9]{0,8}(?:\.[0-9]+)?|0(?:\.[0-9]+)?)|(true|false|null))[ \t\r\n]*([\},]))?/gcx)
        {
            my ($key, $end) = ($1, $5);
            utf8::decode($key) if $Wide;
            if (defined $end) {
                if (defined $3) {
                    $pairs{$key} = READS_EXACTLY ? 0 + $3 : _float($3);
                }
                elsif (defined $2) {
                    $pairs{$key} = $2;
                    utf8::decode($pairs{$key}) if $Wide;
                }
                else {
                    $pairs{$key} = $4 eq 'true' ? $True : $4 eq 'false' ? $False : undef;
                }
                return \%pairs if $end eq '}';
                next;
            }
            $pairs{$key} = _value();
        }
        else {
            /\G[ \t\r\n]*"/gc or _fail('no key');
            my $key = _escaped_string();
            /\G[ \t\r\n]*:/gc or _fail("no ':' after a key");
            $pairs{$key} = _value();
        }
        next if /\G[ \t\r\n]*,/gc;
        return \%pairs if /\G[ \t\r\n]*\}/gc;
        _fail("neither ',' nor '}' after a value");
    }
}

sub _number {
    my ($integer, $rest) = @_;
    if ($rest eq '') {
        my $limit = $integer =~ /\A-/ ? '-' . SMALLEST : LARGEST;
        return 0 + $integer
            if length $integer < length $limit || (length $integer == length $limit && $integer le $limit);
        _fail("an integer beyond Perl's own, for which it is too late to load Math::BigInt,")
            if !$INC{'Math/BigInt.pm'} && in_global_destruction();
        require Math::BigInt;
        # Without the accuracy or precision that the script may have set for all of its own numbers.
        return Math::BigInt->new($integer, undef, undef);
    }
    my $float = _float("$integer$rest");
    _fail('a number too large for Perl') if abs $float == INFINITY;
    # Perl reads "-0.0" as 0.
    return $float == 0 && $integer eq '-0' ? -1 / INFINITY : $float;
}

# For numbers that Perl's own conversion gets wrong: strtod uses the locale, and stops at a full stop if
# the locale has a decimal comma.
sub _float {
    my ($text) = @_;
    if (!READS_EXACTLY && $text =~ /[.eE]/) {
        my ($float, $unparsed) = POSIX::strtod($text);
        return $float if !$unparsed;
    }
    return 0 + $text;
}

# A string that has escapes (or an error), from after its opening quote. The distance to the closing one
# is counted rather than matched: before 5.30, a repeated group ends after 32766 rounds.
sub _escaped_string {
    my $start = pos;
    my $end   = $start - 1;
    my $before;
    do {
        $end = index $_, '"', $end + 1;
        _fail('a string without an end') if $end < 0;
        $before = $end;
        $before-- while substr($_, $before - 1, 1) eq '\\';
    } while (($end - $before) % 2);
    my $string = substr $_, $start, $end - $start;
    _fail('a control character in a string') if $string =~ /[\x00-\x1f]/;
    pos = $end + 1;
    utf8::decode($string) if $Wide;
    $string =~ s/\\(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)/
        exists UNESCAPED->{$1} ? UNESCAPED->{$1} : _unicode($1)/ge;
    return $string;
}

sub _unicode {
    my ($escape) = @_;
    my ($high, $low) = map { hex } $escape =~ /u([0-9a-fA-F]{4})/g;
    _fail("the escape \\$escape is not valid") if !defined $high;
    return chr(0x10000 + ($high - 0xd800) * 0x400 + $low - 0xdc00) if defined $low;
    _fail("\\$escape is half of a pair") if $high >= 0xd800 && $high <= 0xdfff;
    return chr $high;
}

sub _fail {
    my ($what) = @_;
    my $place = defined pos() ? pos : 0;
    die CPANBridge::Error->new(
        message    => "not JSON: $what at byte $place",
        error_type => 'InvalidReply',
    );
}

1;

__END__

=head1 NAME

CPANBridge::JSON::Decoder - JSON to Perl data, without a change to any value

=head1 FUNCTIONS

=over

=item decode($bytes)

The data of a JSON document in UTF-8. Strings are character strings; C<true> and C<false> are
L<CPANBridge::Boolean>s, C<null> is undef. An integer beyond Perl's own is a L<Math::BigInt>. Dies
with a L<CPANBridge::Error> for what is not JSON, half of a surrogate pair, and numbers beyond a
float's range.

=item in_global_destruction()

Whether Perl is past the script's end.

=item has_surrogates($bytes)

Whether bytes that Perl accepts as UTF-8 contain a surrogate, or a code point beyond Unicode.

=back

=cut
